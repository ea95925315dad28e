"""How the tests compile: quickly, since most are of what is computed and not of machine code.

`pytest --optimized` compiles as users do.
"""

import os

import jax

USERS_FLAGS = os.environ.get("XLA_FLAGS")

QUICK_FLAGS = (
    # XLA:CPU's emitters before today's, which take twice the time; versions that have no others
    # any more ignore it.
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def compile_quickly() -> None:
    """In this process, and in those that it starts."""
    os.environ["XLA_FLAGS"] = " ".join((*QUICK_FLAGS, USERS_FLAGS or ""))
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)


def optimized() -> dict[str, str]:
    """The environment of a process that compiles as users do."""
    ours = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    return environment | ({} if USERS_FLAGS is None else {"XLA_FLAGS": USERS_FLAGS})
