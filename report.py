"""From the results of many runs to tables and figures: read any suite's result folders, write report/.

python report.py runs/tiny
python report.py results=[runs/phi,other/eval_log_aggregated.json] retain_result=oracle.json baseline=grad_diff
"""

from omegaconf import DictConfig

from tofu.cli import checks, command_line, schema


@command_line.entry("report", paths="results")
def main(cfg: DictConfig) -> None:
    """Read what is there, write the report; a result that can't be read is listed and stops nothing."""
    cfg = checks.check(cfg, schema.Report)
    from tofu.reporting import report  # here, so that a refused command line does not wait for libraries

    report.write(cfg)


if __name__ == "__main__":
    main()
