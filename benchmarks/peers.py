def compiled(m): return m
def with_sdpa(m): return m
def with_flex(m): return m
