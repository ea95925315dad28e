"""How the tests compile: quickly, since most are of what is computed and not of machine code.

`pytest --optimized` compiles as users do.
"""

import os

import jax

USERS = "XLA_FLAGS_OF_THE_USER"
"""In the environment, so that the processes of pytest-xdist know them, too."""

QUICK_FLAGS = (
    # XLA:CPU's emitters before today's, which take twice the time; versions that have no others
    # any more ignore it.
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def compile_quickly() -> None:
    """In this process, and in those that it starts."""
    users = os.environ.setdefault(USERS, os.environ.get("XLA_FLAGS", ""))
    os.environ["XLA_FLAGS"] = " ".join((*QUICK_FLAGS, users))
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)


def optimized() -> dict[str, str]:
    """The environment of a process that compiles as users do."""
    ours = ("JAX_DISABLE_MOST_OPTIMIZATIONS", USERS)
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    if USERS in os.environ:
        environment["XLA_FLAGS"] = os.environ[USERS]
    return environment
