"""A reward in forty lines: how positive a short text reads, with no prize for saying one word again and again.

VADER looks words up in a list and gives a text its `compound` sentiment, from -1 to 1. Alone it would be won by "great
great great". So what is positive counts only by the share of words that are different, and in full only from five words
on; what is negative counts as it is, for no repetition should soften it.

>>> good, bad, one, four = reward(["Review the bakery."] * 4, [
...     "The bread is wonderful and the staff are friendly.",
...     "The bread is terrible and the staff are rude.",
...     "great",
...     "great great great great"])
>>> bad < 0 < one < good, four < good
(True, True)
"""

import functools
import re

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

FULL_LENGTH = 5  # words from which on length no longer matters


def reward(prompts, completions, **columns):
    """One number from -1 to 1 a completion; completions are texts, or lists of one chat message."""
    return [rate(said if isinstance(said, str) else said[-1]["content"]) for said in completions]


def rate(text):
    """Sentiment of one text, weighed by its variety and length where it is positive."""
    sentiment = analyzer().polarity_scores(text)["compound"]
    if sentiment <= 0:
        return sentiment
    words = re.findall(r"\w+", text.lower())
    variety = len(set(words)) / max(len(words), 1)  # a lone smiley has sentiment and no words
    return sentiment * variety * min(len(words) / FULL_LENGTH, 1)


@functools.cache
def analyzer():
    """VADER's lexicon, read once, when it is first needed."""
    return SentimentIntensityAnalyzer()
