"""How many examples hypothesis tries: `pytest --hypothesis-profile=thorough` takes minutes instead of seconds."""

from hypothesis import settings

settings.register_profile("quick", deadline=None, max_examples=40)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile("quick")
