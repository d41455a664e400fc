"""Small trained UNets: the demo quantizes them, ``train`` trained them."""
