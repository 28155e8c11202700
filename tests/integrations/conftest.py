import pytest

from .registered import forget_the_name


@pytest.fixture(autouse=True)
def unregistered():
    """Before and after each test the name is not registered."""
    forget_the_name()
    yield
    forget_the_name()
