"""What every test has: the watch on what it leaves behind."""

pytest_plugins = ["tests.leaks"]
