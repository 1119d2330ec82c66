"""Training on TPUs, in JAX: a strategy of the shared loop, with its own implementation of the encoder.

It has never run on a TPU: it was tested and measured on a CPU, as one device and as eight JAX devices, so its speed on
a TPU is unknown. One process drives all devices of one machine; several machines, and parameters that do not fit one
device, are not supported.

Only the modules of this package import jax and optax; importing the package alone does not.
"""
