"""The data report: statistics of a folder of annotated instances, and how much selection can gain on it.

`write_report(folder, target)` reads the folder once, in bounded memory, and writes report.html and report.json.
"""

from cappy.annotation.report.data_report_page import write_page, write_report
from cappy.annotation.report.record import DataReport
from cappy.annotation.report.summary import summarize
from cappy.annotation.report.text import to_text

__all__ = ["DataReport", "summarize", "to_text", "write_page", "write_report"]
