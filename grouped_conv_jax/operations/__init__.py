"""What users call: from their arguments to the primitive, one operation a module.

`arguments`, `padding` and `forward` are what the operations have in common; all that is public is
in `grouped_conv_jax` itself.
"""
