"""Small trained UNets: ``train`` trains them, ``demo`` quantizes them."""
