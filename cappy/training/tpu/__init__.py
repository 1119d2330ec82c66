"""Training on TPUs, in JAX: a strategy of the one loop, with an encoder of its own.

No TPU was ever used here. What is known of this package was measured on a CPU that JAX split into eight devices, and on
one; speed on a TPU is unknown. One process drives all devices of one machine. Several machines, and parameters too
large for one device, are not covered.

Nothing outside this package imports jax or optax, and importing the package alone does not.
"""
