"""What a run leaves behind to look at: ``summary.json``, ``report.md`` and plots."""

from trl_grpo_ext.report.page import Example
from trl_grpo_ext.report.versions import library_versions
from trl_grpo_ext.report.write import write_report

__all__ = ["Example", "library_versions", "write_report"]
