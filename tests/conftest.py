"""What all tests share: a slow moment of a busy machine is no finding."""

from hypothesis import settings

settings.register_profile("house", deadline=None)
settings.load_profile("house")
