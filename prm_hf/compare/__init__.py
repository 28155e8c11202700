"""Comparison of finished runs: reads files only.

```python
from prm_hf.compare import compare_runs, format_comparison, write_report

comparison = compare_runs("runs/dpo_noisy")
print(format_comparison(comparison))
write_report(comparison, "runs/dpo_noisy")
```
"""

from .._extras import require


require("prm_hf.compare", "scipy", extra="report")

from ..runs.read import Run, load_runs
from .comparison import Comparison, Contrast, Row
from .report import FORMATS, compare_runs, format_comparison, write_report
from .statistics import Interval, bootstrap_interval, interpolate_at_kl, mean_over_log_kl, noise_floor, rate_at_kl


__all__ = [
    "FORMATS",
    "Comparison",
    "Contrast",
    "Interval",
    "Row",
    "Run",
    "bootstrap_interval",
    "compare_runs",
    "format_comparison",
    "interpolate_at_kl",
    "load_runs",
    "mean_over_log_kl",
    "noise_floor",
    "rate_at_kl",
    "write_report",
]
