"""Several processes, on this machine or on many, that share the work on a block; the bytes stay those of one.

    opening.py      from --cluster to workers             address.py      what --cluster may say
    block_parts.py  a block's parts: driver and worker    spilling.py     tensors in a shared folder
    workers.py      items handed to processes, deaths     messages.py     calls as bytes
    pool.py         what kinds of processes have in common
    processes.py    those of this machine                 ray_actors.py   those that Ray places

Methods say what their parts are (algorithms/parts.py), and tuning runs who does them (tuning/run.py).
"""
