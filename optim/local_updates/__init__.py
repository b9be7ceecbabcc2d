"""Workers train alone for a while, then meet: local SGD, SlowMo, DiLoCo, CO2."""
