"""nbval leaves the assignments alone: a release must fail, and tests/assignments runs them all."""

collect_ignore_glob = ["*"]
