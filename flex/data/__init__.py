"""From files to token ids: records, their split over clients, encoded examples."""

__all__ = ["examples", "records", "splits"]
