"""The points in results/ lie on the curves of `benchmarks/traffic.py`; tests/distributed/ counts what is sent now."""

import json

from benchmarks import traffic


def test_what_was_counted_is_what_the_model_says():
    counted = json.loads(traffic.POINTS.read_text())["counted"]
    assert {x["processes"] for x in counted} == {2, 4, 8} and {x["path"] for x in counted} >= {*traffic.PATHS}
    for x in counted:
        expected = traffic.step_traffic(traffic.shapes_of("1.6M"), x["path"], x["processes"], x["reduction"])
        assert (x["messages"], x["bytes"], x["kept"]) == expected
