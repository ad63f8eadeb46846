"""The command line's share of the environment: what it hands to the programs it starts."""

import os


def environment_of_child(**changes: str) -> dict[str, str]:
    """Our environment with changes, for a program of ours."""
    return {**os.environ, **changes}
