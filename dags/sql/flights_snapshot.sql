-- Flights of the run's month and of the three months before it, with the weather at the scheduled hour, the plane
-- and the two airports. One row per flight that arrived.
--
-- The window's bounds are read as New York wall-clock time, in which all columns but time_hour (UTC) are given; so
-- weather is joined on the local hour, never on time_hour.
WITH flown AS (
    SELECT DISTINCT *
    FROM flights
    WHERE arr_delay IS NOT NULL  -- cancelled and diverted flights have no delay to predict
), timed AS (
    SELECT *, make_timestamp(year, month, day, hour, minute, 0) AS scheduled_at
    FROM flown
), planned AS (
    SELECT make_timestamp(year, month, day, hour, 0, 0) AS hour_at, origin, count(*) AS departures_this_hour
    FROM (SELECT DISTINCT * FROM flights)  -- the schedule is known beforehand, cancellations are not
    GROUP BY ALL
)
SELECT
    t.scheduled_at,
    CAST(t.scheduled_at AS DATE) AS day,
    t.carrier, t.flight, t.tailnum, t.origin, t.dest, t.distance,
    t.sched_arr_time,
    t.arr_delay > 15 AS late,
    p.departures_this_hour,
    w.temp, w.dewp, w.humid, w.wind_dir, w.wind_speed, w.wind_gust, w.precip, w.pressure, w.visib,
    pl.year AS plane_year, pl.manufacturer, pl.seats, pl.engines,
    a.lat AS dest_lat, a.lon AS dest_lon, a.alt AS dest_alt,
    al.name AS airline
FROM timed t
JOIN planned p ON p.hour_at = date_trunc('hour', t.scheduled_at) AND p.origin = t.origin
LEFT JOIN weather w
    ON w.origin = t.origin AND w.year = t.year AND w.month = t.month AND w.day = t.day AND w.hour = t.hour
LEFT JOIN planes pl ON pl.tailnum = t.tailnum
LEFT JOIN airports a ON a.faa = t.dest
LEFT JOIN airlines al ON al.carrier = t.carrier
WHERE t.scheduled_at >= CAST($window_start AS TIMESTAMP) - INTERVAL 3 MONTH
  AND t.scheduled_at < CAST($window_end AS TIMESTAMP)
