from tests.integration.conftest import world  # noqa: F401
