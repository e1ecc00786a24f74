"""The errors a person may meet. Each message says what was expected, what came, where, and what to do.

LoupeError
├── ConfigError      params.yaml holds an unknown key or an impossible value
├── DataError        a folder, an image or a table is not what it must be
│   └── ValidationError  the data failed its critical expectations
├── WeightsError     pretrained weights can't be had, or don't fit
├── TrackingError    MLflow holds no such run, model or version
└── PipelineError    a stage of the pipeline failed, or ran out of time
"""


class LoupeError(Exception):
    """Base of every error that is shown to a person as one sentence, without a traceback."""


class ConfigError(LoupeError):
    """A key or a value of params.yaml is not allowed."""


class DataError(LoupeError):
    """A folder, an image or a table is not what it must be."""


class ValidationError(DataError):
    """The data failed at least one critical expectation."""


class WeightsError(LoupeError):
    """Pretrained weights can't be had from where they were asked for, or don't fit the network."""


class TrackingError(LoupeError):
    """MLflow holds no such run, model or version."""


class PipelineError(LoupeError):
    """A stage of the pipeline failed, or ran out of time."""
