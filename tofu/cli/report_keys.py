"""What report.py's config may hold."""

from omegaconf import DictConfig, ListConfig

from tofu.cli.schema import REPORT_FORMATS, TRUTH_RATIOS
from utils import BadInput, choice

LISTS = ("results", "retain_result", "group_by", "metrics", "format")  # one text means a list of one


def check(cfg: DictConfig) -> None:
    """Raise BadInput for a value that is not allowed; keys that may be one text or a list become lists."""
    for key in LISTS:
        if cfg[key] is None and key != "results":
            continue
        cfg[key] = cfg[key] if isinstance(cfg[key], ListConfig) else [cfg[key]]
        if not cfg[key] or not all(isinstance(one, str) and one for one in cfg[key]):
            raise BadInput(f"{key}={cfg[key]}: it must be a text, or a list of texts, {key}=[A,B]")
    for name in cfg.format:
        choice("format", name, REPORT_FORMATS)
    choice("truth_ratio", cfg.truth_ratio, TRUTH_RATIOS)
