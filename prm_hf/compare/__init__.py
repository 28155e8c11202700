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

from ..runs.read import load_runs
from .comparison import Comparison
from .report import compare_experiments, compare_runs, format_comparison, write_report
from .rows import Row
from .statistics import Interval, rate_at_kl


__all__ = [
    "Comparison",
    "Interval",
    "Row",
    "compare_experiments",
    "compare_runs",
    "format_comparison",
    "load_runs",
    "rate_at_kl",
    "write_report",
]
