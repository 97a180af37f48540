"""What the tests of the report share."""

import pytest
from run_folders import read_yaml

from onlinenorm.report.spec import ReportSpec, parse_spec


@pytest.fixture(scope="session")
def spec(root) -> ReportSpec:
    """The committed configs/report.yaml."""
    return parse_spec(read_yaml(root / "configs" / "report.yaml"))
