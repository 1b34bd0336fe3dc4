-- What is known about a flight before it departs, and about its carrier, route and airport from earlier days.
-- Times are New York wall-clock time. History ends with the day before the flight's own: nothing looks ahead.
WITH origins AS (
    SELECT origin, day, sum(late::INTEGER) AS late, count(*) AS flights
    FROM snapshot GROUP BY ALL
), carriers AS (
    SELECT carrier, day, sum(late::INTEGER) AS late, count(*) AS flights
    FROM snapshot GROUP BY ALL
), dests AS (
    SELECT dest, day, sum(late::INTEGER) AS late, count(*) AS flights
    FROM snapshot GROUP BY ALL
), numbers AS (
    SELECT carrier, flight, dest, day, sum(late::INTEGER) AS late, count(*) AS flights
    FROM snapshot GROUP BY ALL
), origin_history AS (
    SELECT origin, day, sum(late) OVER w / sum(flights) OVER w AS share
    FROM origins
    WINDOW w AS (PARTITION BY origin ORDER BY day RANGE BETWEEN INTERVAL 1 DAY PRECEDING AND INTERVAL 1 DAY PRECEDING)
), carrier_history AS (
    SELECT carrier, day, sum(late) OVER w / sum(flights) OVER w AS share
    FROM carriers
    WINDOW w AS (PARTITION BY carrier ORDER BY day RANGE BETWEEN INTERVAL 14 DAY PRECEDING AND INTERVAL 1 DAY PRECEDING)
), dest_history AS (
    SELECT dest, day, sum(late) OVER w / sum(flights) OVER w AS share
    FROM dests
    WINDOW w AS (PARTITION BY dest ORDER BY day RANGE BETWEEN INTERVAL 28 DAY PRECEDING AND INTERVAL 1 DAY PRECEDING)
), number_history AS (
    SELECT carrier, flight, dest, day, sum(late) OVER w / sum(flights) OVER w AS share
    FROM numbers
    WINDOW w AS (
        PARTITION BY carrier, flight, dest ORDER BY day RANGE BETWEEN INTERVAL 28 DAY PRECEDING AND INTERVAL 1 DAY PRECEDING
    )
)
SELECT
    s.scheduled_at,
    s.day,
    s.late,
    s.carrier,
    s.origin,
    s.dest,
    s.distance,
    date_part('hour', s.scheduled_at) + date_part('minute', s.scheduled_at) / 60 AS departure_hour,
    s.sched_arr_time // 100 + (s.sched_arr_time % 100) / 60 AS arrival_hour,
    date_part('isodow', s.scheduled_at) AS weekday,
    s.departures_this_hour,
    s.temp, s.dewp, s.humid, s.wind_dir, s.wind_speed, s.wind_gust, s.precip, s.pressure, s.visib,
    date_part('year', s.scheduled_at) - s.plane_year AS plane_age,
    s.seats,
    s.engines,
    s.dest_lat,
    s.dest_lon,
    o.share AS origin_late_yesterday,
    c.share AS carrier_late_14d,
    d.share AS dest_late_28d,
    n.share AS flight_late_28d
FROM snapshot s
JOIN origin_history o USING (origin, day)
JOIN carrier_history c USING (carrier, day)
JOIN dest_history d USING (dest, day)
JOIN number_history n USING (carrier, flight, dest, day)
