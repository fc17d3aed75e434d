"""The explorer: one page in which the idea can be played with, and exercises that compute their answers.

numbers.js    the formulas, those of klimb.exact
page.js       sliders, bars and charts;  page.html, page.css
exercises.js  questions, answered by computing
page.py       all of it in one file that opens without a network
"""

from klimb.explorer.page import write_explorer

__all__ = ["write_explorer"]
