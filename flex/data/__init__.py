"""From files to token ids: records, their split over clients, encoded examples."""
