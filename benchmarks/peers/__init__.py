"""Other libraries' quantization, through their public APIs: linear layers on a GPU, whole UNets on a CPU."""
