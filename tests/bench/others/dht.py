"""Where hivemind's peers meet, for the two systems that are built on it."""

import time

import hivemind


def meet(task):
    """A worker's DHT; whoever they meet at stays in here for ever."""
    options = {"nat_port_map": False, "start": True}
    if task.index is None:
        dht = hivemind.DHT(host_maddrs=[f"/ip4/{task.hub}/tcp/0"], **options)
        task.say(next(str(each) for each in dht.get_visible_maddrs() if task.hub in str(each)))
        time.sleep(86400)
    here = f"/ip4/{task.addresses[task.index]}/tcp/0"
    return hivemind.DHT(initial_peers=[task.meeting], host_maddrs=[here], **options)
