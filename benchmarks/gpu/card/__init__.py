"""What a borrowed GPU is asked in ten minutes: `wavlm-fast gpu`.

`supervise.py` keeps the time and writes the record (`record.py`), `worker.py` is the process that touches the device
and may die of it, `session.py` decides what comes next. Each kind of question is a file of steps (`steps.py`):
`roof.py`, `parity.py`, `attention.py`, `stages.py`, `models.py`, `tuning.py`. `tables.py` shows what was found.
"""
