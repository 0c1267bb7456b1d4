"""Rewards of the demo, in the calling convention of TRL: lists in, one float a completion out."""


def exact_answer(completions: list[str], answer: list[str], **columns) -> list[float]:
    """1.0 where the completion is the `answer` column of its row, else 0.0; outer white space is
    ignored."""
    return [
        float(text.strip() == expected.strip())
        for text, expected in zip(completions, answer, strict=True)
    ]
