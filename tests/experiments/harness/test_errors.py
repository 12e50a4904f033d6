"""Texts for a terminal."""

from configs.settings.declaration import shown
from experiments.harness.errors import ConfigError, one_line


def test_an_error_is_one_line_without_control_characters():
    assert str(ConfigError("a\n  b\x1b[31m\udce9 ±")) == r"a b\x1b[31m\udce9 ±"


def test_a_value_of_great_length_is_cut():
    line = one_line(f"name = {'x' * 10**6}; remedy")
    assert line == f"name = {'x' * 150}…{'x' * 49}; remedy"


def test_a_number_that_python_does_not_write_is_shown():
    assert shown(10**5000) == "a value with a number of thousands of digits"
