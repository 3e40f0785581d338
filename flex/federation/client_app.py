"""The client's turn behind Flower's messages: the same `ClientApp` runs in one process and under Flower's engine."""

from flex.federation.client import ClientRuntime
from flex.federation.flower import ClientApp, Context, Message, MetricRecord, RecordDict
from flex.federation.messages import ARRAYS, CLIENT_INDEX, CONFIG, METRICS, NUM_EXAMPLES, to_arrays, to_record
from flex.federation.rounds import answer_identity


def make_client_app(runtime: ClientRuntime) -> ClientApp:
    """Answers train messages with the shared update and the turn's numbers, evaluate messages with the scores.

    What a message holds is said in `engine.py`. In a round that ends with an evaluation the client also scores its own
    model before the server averages it.
    """
    app = ClientApp()
    app.query()(answer_identity)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client_id, config = str(context.node_config["client-id"]), message.content[CONFIG]
        round_index = int(config["server-round"])
        shared = to_arrays(message.content[ARRAYS])
        update, metrics = runtime.train(client_id, round_index, shared, float(config.get("proximal-mu", 0.0)))
        if config.get("evaluate", False):
            runtime.evaluate(client_id, round_index, None, "before_aggregation")
        record = {
            CLIENT_INDEX: int(context.node_config["partition-id"]),
            NUM_EXAMPLES: metrics["num_examples"],
            "loss": metrics["loss"],
            "seconds": metrics["seconds"],
            "opening": metrics["opening"] or [],
        }
        return Message(RecordDict({ARRAYS: to_record(update), METRICS: MetricRecord(record)}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        client_id, round_index = str(context.node_config["client-id"]), int(message.content[CONFIG]["server-round"])
        shared = to_arrays(message.content[ARRAYS])
        scores = runtime.evaluate(client_id, round_index, shared, "after_aggregation")["test"]
        record = {
            CLIENT_INDEX: int(context.node_config["partition-id"]),
            NUM_EXAMPLES: scores["num_examples"],
            "loss": scores["loss"],
            "exact-match": scores["exact_match"],
        }
        return Message(RecordDict({METRICS: MetricRecord(record)}), reply_to=message)

    return app
