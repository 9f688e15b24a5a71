"""The page of `timm-cmt app`, for all who can reach this machine."""

from timm_cmt.cli import main

raise SystemExit(main(["app", "cmt_s.in1k", "--host", "0.0.0.0"]))
