import inspect

import pytest

from loupe import errors

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("kind", KINDS)
def test_one_except_clause_catches_every_error(kind):
    assert issubclass(kind, errors.LoupeError)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tree_in_the_docstring_names_every_error(kind):
    assert kind.__name__ in errors.__doc__


def test_failed_expectations_are_a_kind_of_data_error():
    assert issubclass(errors.ValidationError, errors.DataError)
