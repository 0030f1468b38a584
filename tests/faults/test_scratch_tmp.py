import asyncio, pytest
from collections import Counter
from tests.faults.fleet import open_fleet
from tests.faults.streams import bodies, run_streams
pytestmark = pytest.mark.full
def test_scratch(cluster, poisoned):
    with open_fleet(cluster, poisoned, replicas=2, ingress_replicas=2, tensor_parallel_size=1, step_timeout_s=60.0, silence_timeout_s=60.0, health_check_timeout_s=60.0) as fleet:
        recs = asyncio.run(run_streams(fleet.url, bodies(fleet.model_name, 32, 320)))
        print(Counter((str(r.error), r.cut, r.num_done, len(r.token_ids)) for r in recs))
        import httpx
        print([l for l in httpx.get(fleet._cluster.metrics_url).text.splitlines() if "m3_routed" in l or "m3_engine_load{" in l])
        assert 0
