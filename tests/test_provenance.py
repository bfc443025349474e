import ast

import pytest

from queryfoil import provenance


@pytest.mark.parametrize(
    "line",
    [
        "from queryfoil import metrics",
        "from queryfoil.metrics import NEVER",
        "from queryfoil.metrics.counts import NEVER",
        "from queryfoil.metrics import calibration, usefulness",
        "from queryfoil.metrics.usefulness import usefulness",
    ],
)
def test_metrics_are_no_part_of_what_decides_a_result(line):
    assert provenance._imported(ast.parse(line)) == []


def test_what_decides_a_result_is_followed():
    tree = ast.parse("from queryfoil import losses\nfrom queryfoil.oracle import Oracle\nimport numpy")
    assert provenance._imported(tree) == ["queryfoil.losses", "queryfoil.oracle"]
