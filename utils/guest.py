"""Whether this process, and so its TensorFlow, belongs to another program that only asks for predictions (packrcnn.py).

Then TensorFlow's modes, the environment, messages and warnings stay as that program has them: graphs are built and run
beside its eager code. It must be decided before utils.tf_v1 is imported.
"""

__all__ = ["be_guest", "is_guest"]

_is_guest = False


def be_guest() -> None:
    global _is_guest
    _is_guest = True


def is_guest() -> bool:
    return _is_guest
