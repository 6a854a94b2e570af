PLAYED: set[tuple[str,str]] = set()
