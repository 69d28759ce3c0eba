"""One HTML page from the folder of a run, or from several: ``trl-grpo-ext report``."""

from trl_grpo_ext.report.web.write import write_web_report

__all__ = ["write_web_report"]
