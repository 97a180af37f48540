"""What the tests of the report share."""

import pytest

from onlinenorm.report.settings import ReportSpec, load_spec


@pytest.fixture(scope="session")
def spec() -> ReportSpec:
    """The committed onlinenorm/report/published.yaml."""
    return load_spec()
