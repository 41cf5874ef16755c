"""The host side of the Triton and Gluon kernels, and the only code that imports them."""
