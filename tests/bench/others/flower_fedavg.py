"""Flower's FedAvg over gRPC: whole models in fp32, up to a server and down again, every so many steps."""

import flwr
import torch
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from task import begin

PORT = 29700


def arrays(model):
    return [value.detach().numpy() for value in model.parameters()]


def put(model, values):
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(torch.from_numpy(value.copy()))


class Worker(flwr.client.NumPyClient):
    def __init__(self, task):
        self.task, self.model, self.step = task, task.model(), 0
        self.optimizer = task.optimizer(
            self.model.parameters()
        )  # its state stays; a client of the examples starts anew

    def get_parameters(self, config):
        return arrays(self.model)

    def fit(self, parameters, config):
        put(self.model, parameters)
        for _ in range(self.task.inner_steps):
            self.task.step(self.step, self.model, self.optimizer)
            self.step += 1
        return arrays(self.model), self.task.inner_steps, {}


class Server(flwr.server.strategy.FedAvg):
    def aggregate_fit(self, *given):
        self.newest, metrics = super().aggregate_fit(*given)
        return self.newest, metrics


def main():
    task = begin()
    if task.index is None:
        model = task.model()
        everyone = {"min_fit_clients": task.workers, "min_available_clients": task.workers}
        initial = ndarrays_to_parameters(arrays(model))
        strategy = Server(fraction_evaluate=0.0, initial_parameters=initial, **everyone)
        task.say(f"{task.hub}:{PORT}")
        rounds = flwr.server.ServerConfig(num_rounds=task.steps // task.inner_steps)
        flwr.server.start_server(server_address=f"{task.hub}:{PORT}", config=rounds, strategy=strategy)
        put(model, parameters_to_ndarrays(strategy.newest))
        task.done(model)
        return
    worker = Worker(task)
    task.ready()
    flwr.client.start_client(server_address=task.meeting, client=worker.to_client())
    task.say(f"done {worker.step}")


main()
