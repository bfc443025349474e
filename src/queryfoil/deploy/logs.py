"""Log lines of the server on stderr: ours as asked, those of the libraries below only when something is wrong."""

import logging.config

LEVELS = ("debug", "info", "warning", "error")


def log_to_stderr(level: str) -> None:
    """Log our lines from `level` on. With "debug" also a line for each request; images and scores never are logged."""
    ours, debug = level.upper(), level == "debug"
    stderr = {"handlers": ["stderr"], "propagate": False}
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(message)s"}},
            "handlers": {
                "stderr": {"class": "logging.StreamHandler", "formatter": "line", "stream": "ext://sys.stderr"}
            },
            "loggers": {
                "queryfoil": {"level": ours, **stderr},
                "kserve": {"level": "INFO" if debug else "ERROR", **stderr},
                "uvicorn": {"level": "INFO" if debug else "ERROR", **stderr},
                "uvicorn.access": {"level": "INFO", "propagate": False, "handlers": ["stderr"] if debug else []},
            },
            "root": {"level": "WARNING", "handlers": ["stderr"]},
        }
    )
