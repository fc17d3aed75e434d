"""The report of a run: one HTML page that opens without a network, made from the files of the run directory.

found.py     what the run left on disk, and what is not there yet
words.py     numbers and verdicts in plain words
chart.py     what all charts share, as Vega-Lite specifications; frontier_chart.py, histogram_chart.py, step_charts.py,
             time_chart.py, audit.py and overlay.py draw them
reached.py   the ceiling, the way of training, the policy's ellipse
draws.py     which completions the page carries
pool.py      the plan's rewards, from which the slider of beta computes
page.py      all of it in one file: page.html, page.css, and tilt.js, slider.js, table.js, draws.js, page.js
compared.py  several runs side by side; overlay.py their chart, compared.html their page
files.py     charts as PNG and SVG
"""

from klimb.report.page import write_comparison, write_report

__all__ = ["write_comparison", "write_report"]
