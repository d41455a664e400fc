"""Image quality of quantized UNets: the comparison of methods and libraries, and studies of single questions."""
