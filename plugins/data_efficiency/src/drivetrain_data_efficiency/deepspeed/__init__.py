"""Names of ``deepspeed.runtime.data_pipeline``, in terms of this package."""
