"""
The replay: requests over simulated nodes in virtual time, by the real router or by others' rules.

::

    cluster = find_cluster("24+24+12+8")
    load = read_load("poisson:rate=0.5,requests=200")
    outcome = run(cluster, load.requests(cluster, seed=1), "hydra", seed=1)
    print(outcome.first_token_seconds("mean"))

`workload` has the requests, `clusters` the machines, `policies` who chooses, `running` the run,
`measures` what came of it.
"""
