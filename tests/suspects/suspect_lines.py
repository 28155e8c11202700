"""Lines of `suspects.jsonl`, for the tests of the page that is made of them."""

import json


HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<img src=x onerror=alert(3)>",
    "</textarea></style><svg onload=alert(4)>",
    "\u2028alert(5)\u2029",
    "\u202egnp.exe\u2066",
    "a\u0000b\u200bc\u00add\ufeffe\ud800f",
    '" autofocus onfocus="alert(6)',
    "<!-- --><![CDATA[ ]]>",
    "&lt;b&gt; &amp; javascript:alert(7)",
)


def line(row, p, data, margins=(-0.5, -1.0), in_sample=(-0.2, 0.4)):
    return {
        "row": row,
        "probability_wrong": p,
        "score": p,
        "margins": list(margins),
        "in_sample_margins": None if in_sample is None else list(in_sample),
        "fold": 0,
        "data": data,
    }


def ranked(lines):
    lines = sorted(lines, key=lambda line: -line["probability_wrong"])
    return [{**line, "rank": rank} for rank, line in enumerate(lines, start=1)]


def pairs(n):
    """Rows of which the first is the most suspect one, with long texts, conversations and right-to-left texts."""
    data = [{"prompt": f"Question {i}?", "chosen": f"It is {i}.", "rejected": f"It is {i + 1}."} for i in range(n)]
    data[1] = {"prompt": "long " * 400, "chosen": "words\n" * 60, "rejected": "x" * 5000, "source": "web"}
    data[2] = {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "מה שלומך?"}],
        "chosen": [{"role": "assistant", "content": "שלום (1)"}],
        "rejected": [{"role": "assistant", "content": "سلام", "tool_calls": [{"name": "f"}]}],
    }
    data[3] = {"prompt": HOSTILE[0], "chosen": " ".join(HOSTILE), "rejected": HOSTILE[2], HOSTILE[1]: list(HOSTILE)}
    return ranked([line(i, max(0.99 - i / 150, 0.01), row) for i, row in enumerate(data)])


def summary(kind="preference", how="out of fold", **others):
    shares = {"share_wrong": 0.28, "share_low": 0.21, "share_high": 0.35}
    return {"rows": 0, **shares, "how": how, "kind": kind, "settings": {}, **others}


def write_lines(folder, lines, about):
    """The two files that the page is made of."""
    (folder / "suspects.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "suspects_summary.json").write_text(json.dumps(about), encoding="utf-8")
