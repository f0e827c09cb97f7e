"""What users type, and the names of the weights in their files, change only on purpose."""

from tests.public_names import FILE, lines


def test_public_names_stay():
    assert lines() == FILE.read_text().splitlines(), "see tests/public_names.py"
