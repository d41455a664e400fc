"""Times on the device at hand: operators, whole UNets, and the suite that runs them all."""
